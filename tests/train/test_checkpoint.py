from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgen.train.checkpoint import Checkpoint, CheckpointFolder, all_finite, load_optimizer, optimizer_state
from fastgen.train.run_folder import remove_leftovers


def test_tensors_and_state_survive(tmp_path: Path) -> None:
    tensors = {
        "model.weight": torch.randn(3, 4).t(),  # not contiguous
        "model.scalar": torch.tensor(3, dtype=torch.int64),
        "model.empty": torch.zeros(0, 2),
        "model.half": torch.randn(5).bfloat16(),
    }
    state = {"step": 7, "value": 0.1 + 0.2, "best": None, "nested": {"a": [1, 2]}}
    Checkpoint(tensors, state).save(tmp_path / "c.safetensors")
    loaded = Checkpoint.load(tmp_path / "c.safetensors")
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors[name], tensor)
    assert loaded.part("model").keys() == {"weight", "scalar", "empty", "half"}


def test_tied_weights_are_stored_under_both_names(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    Checkpoint({"a": weight, "b": weight, "c": weight[1:3]}, {}).save(tmp_path / "c.safetensors")
    loaded = Checkpoint.load(tmp_path / "c.safetensors").tensors
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], weight)
    assert torch.equal(loaded["c"], weight[1:3])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.7, 0.9), fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
        lambda p: torch.optim.NAdam(p, lr=0.1),
    ],
    ids=["adamw", "amsgrad", "nesterov", "sgd", "rmsprop", "nadam"],
)
def test_optimizers_go_on_with_the_same_bits(make, tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    model, batches = nn.Linear(3, 2), torch.randn(5, 4, 3)
    optimizer = make([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}])
    for x in batches[:3]:
        step(model, optimizer, x)
    tensors, values = optimizer_state("o", optimizer)
    model_tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    Checkpoint({**model_tensors, **tensors}, {"optimizers": {"o": values}}).save(tmp_path / "c.safetensors")

    checkpoint = Checkpoint.load(tmp_path / "c.safetensors")
    other = nn.Linear(3, 2)
    other.load_state_dict(checkpoint.part("model"))
    resumed = make([{"params": [other.weight]}, {"params": [other.bias], "weight_decay": 0.0}])
    load_optimizer("o", resumed, checkpoint)
    assert resumed.param_groups[0].get("betas") == optimizer.param_groups[0].get("betas")
    for x in batches[3:]:
        step(model, optimizer, x)
        step(other, resumed, x)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


@pytest.mark.parametrize("cut", [0, 4, 40, -1])
def test_a_damaged_file_is_named(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    Checkpoint({"a": torch.ones(100)}, {}).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"c\.safetensors: damaged checkpoint"):
        Checkpoint.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a checkpoint"):
        Checkpoint.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        Checkpoint.load(tmp_path / "absent.safetensors")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    folder.save(1, Checkpoint({"a": torch.ones(1000)}, {}))
    # The nearest to a full disk that a test can do: the system refuses to write more than 20 kB to a file.
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="step-00000002"):
            folder.save(2, Checkpoint({"a": torch.ones(10_000)}, {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert torch.equal(Checkpoint.load(folder.path(1)).tensors["a"], torch.ones(1000))


def test_the_last_few_and_the_best_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert folder.latest() is None
    for step in (10, 20, 30, 40, 50):
        folder.save(step, Checkpoint({}, {"step": step}), best=20 if step >= 20 else None)
    assert folder.steps() == [20, 40, 50]
    assert folder.latest() == folder.path(50)
    folder.save(60, Checkpoint({}, {}), best=60)
    assert folder.steps() == [50, 60]


def test_leftovers_of_a_killed_writer_are_neither_seen_nor_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(10, Checkpoint({}, {"step": 10}))
    (tmp_path / ".step-00000020-abc1_3xy.safetensors").write_bytes(b"half")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".model-abcdefgh.safetensors").write_bytes(b"half")
    (tmp_path / ".notes-on-this-run.md").write_text("of the user")
    assert folder.latest() == folder.path(10)
    remove_leftovers(tmp_path)
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == [".notes-on-this-run.md", "step-00000010.safetensors"]


def test_all_finite() -> None:
    assert all_finite([torch.ones(2), torch.tensor([2**62])])
    assert not all_finite([torch.ones(2), torch.tensor([1.0, torch.inf])])
    assert not all_finite([torch.tensor(torch.nan, dtype=torch.bfloat16)])
