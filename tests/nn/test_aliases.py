"""fastgen.nn in the place of torch.nn: the same names and objects but for its own, in any order of imports."""

import importlib
import json
import pickle
import pkgutil
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastgen
import fastgen.nn

TRANSFORMERS = {"MultiheadAttention", "Transformer", "TransformerDecoderLayer", "TransformerEncoderLayer"}
OWN = {"LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "Linear"} | TRANSFORMERS  # replaced by subclasses


def submodules() -> list[str]:
    """All submodules of torch.nn, at any depth, relative to it; those that PyTorch deprecates included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pkgutil.walk_packages(torch.nn.__path__, "torch.nn.", onerror=lambda name: None)
        return [module.name.removeprefix("torch.nn.") for module in found]


SUBMODULES = submodules()


def python(code: str, *arguments: str, **options: object) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_the_object_of_torch():
    names = {name for name in dir(torch.nn) if not name.startswith("__")}
    assert {"Linear", "Module", "Parameter", "functional", "init", "utils", "attention", "_reduction"} <= names
    assert {name for name in names if getattr(fastgen.nn, name) is not getattr(torch.nn, name)} == OWN
    assert names <= set(dir(fastgen.nn))
    assert set(getattr(torch.nn, "__all__", [])) <= set(dir(fastgen.nn))


def test_star_import():
    ours, theirs = {}, {}
    exec("from fastgen.nn import *", ours)
    exec("from torch.nn import *", theirs)
    del ours["__builtins__"], theirs["__builtins__"]
    own = {name for name, value in ours.items() if theirs.get(name) is not value}
    # fastgen.nn.lora is there once someone imports it.
    assert own - {"lora"} == OWN | {"linear", "recurrent", "transformer"}
    assert set(theirs) - set(ours) <= set(
        SUBMODULES
    )  # torch.nn has a submodule as an attribute once someone imports it
    assert len(ours) > 150


@pytest.mark.parametrize("name", SUBMODULES)
def test_every_submodule_is_the_module_of_torch(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = importlib.import_module(f"torch.nn.{name}")
        except ImportError:
            pytest.skip("PyTorch itself cannot import it here")
        assert importlib.import_module(f"fastgen.nn.{name}") is theirs
    assert theirs.__name__ == theirs.__spec__.name == f"torch.nn.{name}"


def test_statements_as_they_are_written():
    from fastgen.nn.attention import SDPBackend
    from fastgen.nn.modules.linear import Bilinear as DeepBilinear
    from fastgen.nn.parallel import DistributedDataParallel
    from fastgen.nn.utils.parametrizations import weight_norm
    from fastgen.nn.utils.rnn import pack_padded_sequence

    import fastgen.nn as nn
    import fastgen.nn.functional as F
    from fastgen.nn import Bilinear, Parameter
    from fastgen.nn import functional as G

    assert F is G is nn.functional is torch.nn.functional
    assert Bilinear is DeepBilinear is torch.nn.Bilinear
    assert Parameter is torch.nn.Parameter
    assert SDPBackend is torch.nn.attention.SDPBackend
    assert DistributedDataParallel is torch.nn.parallel.DistributedDataParallel
    assert weight_norm is torch.nn.utils.parametrizations.weight_norm
    assert pack_padded_sequence is torch.nn.utils.rnn.pack_padded_sequence


def test_names_that_torch_does_not_have():
    with pytest.raises(AttributeError, match=r"^module 'fastgen.nn' has no attribute 'Nothing'$"):
        _ = fastgen.nn.Nothing
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'fastgen.nn.nothing'$"):
        importlib.import_module("fastgen.nn.nothing")
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'fastgen.nn.utils.nothing'$"):
        importlib.import_module("fastgen.nn.utils.nothing")
    with pytest.raises(ImportError, match=r"^cannot import name 'Nothing' from 'fastgen\.nn'"):
        exec("from fastgen.nn import Nothing")


# Prints, for every module of torch.nn that can be imported, the names in it and what they are.
INVENTORY = """
import importlib, json, sys
imports, inventory = sys.argv[1:]
for name in json.loads(imports):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
import torch
found = {}
for name in json.loads(inventory):
    module = sys.modules.get("torch.nn." + name)
    found[name] = module and {key: type(value).__name__ for key, value in vars(module).items()}
    alias = sys.modules.get("fastgen.nn." + name)
    assert alias is None or alias is module, name
print(json.dumps(found))
"""


def test_imports_leave_torch_as_it_is():
    """Also where a function has the name of the module that it is from, as torch.nn.utils.spectral_norm."""
    names = sorted(SUBMODULES, key=lambda name: (-name.count("."), name))  # no parent imported by itself
    untouched, shared = (
        json.loads(python(INVENTORY, json.dumps([f"{package}.{name}" for name in names]), json.dumps(SUBMODULES)))
        for package in ("torch.nn", "fastgen.nn")
    )
    assert untouched["utils"]["spectral_norm"] == untouched["parallel"]["data_parallel"] == "function"
    assert shared == untouched


@pytest.mark.parametrize(
    "lines",
    [
        "from fastgen.nn.utils.rnn import pad_sequence; import torch.nn.utils.rnn",
        "import torch.nn.quantized; from fastgen.nn import quantized; import fastgen.nn.quantized.dynamic.modules.rnn",
    ],
)
def test_first_import_of_a_fresh_interpreter(lines):
    code = """
import sys
import torch
shared = {name: module for name, module in sys.modules.items() if name.startswith("fastgen.nn.")}
for own in ("_aliases", "_dynamo", "_script", "linear", "recurrent", "transformer"):
    del shared["fastgen.nn." + own]
assert len(shared) > 30
for name, module in shared.items():
    assert module is sys.modules["torch.nn." + name.removeprefix("fastgen.nn.")], name
print("the same")
"""
    assert python(lines + code) == "the same\n"


def test_submodules_that_torch_loads_later(tmp_path):
    """A package like torch.nn.parallel, where a function hides its module, that nothing has imported yet."""
    package = tmp_path / "planted"
    package.mkdir()
    (package / "__init__.py").write_text("from torch.nn.planted.job import job\n")
    (package / "job.py").write_text("def job(): pass\n")
    code = """
import sys, fastgen.nn, torch
torch.nn.__path__.append(sys.argv[1])
import fastgen.nn.planted.job
from fastgen.nn.planted.job import job
assert fastgen.nn.planted is torch.nn.planted and torch.nn.planted.job is job
assert sys.modules["fastgen.nn.planted.job"] is sys.modules["torch.nn.planted.job"]
print("a function")
"""
    assert python(code, str(tmp_path)) == "a function\n"


PROGRAM = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn import init
from torch.nn.utils import clip_grad_norm_

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU())
        self.rnn = nn.LSTM(8, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(6))
        init.orthogonal_(self.body[0].weight)

    def forward(self, x):
        h, _ = self.rnn(self.body(x))
        h, _ = self.attention(h, h, h)
        return F.dropout(h * self.scale, 0.1, self.training)

torch.manual_seed(0)
net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
losses = []
x, target = torch.randn(3, 4, 5), torch.randn(3, 4, 6)
for _ in range(10):
    loss = nn.functional.mse_loss(net(x), target)
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
"""


def run_program(package: str) -> dict[str, object]:
    namespace = {"__name__": "program"}
    exec(PROGRAM.replace("torch.nn", package), namespace)
    return namespace


def test_program_with_the_import_changed():
    theirs, ours = run_program("torch.nn"), run_program("fastgen.nn")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)  # fastgen's LSTM rounds in another order
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["optimizer"].state_dict().keys() == theirs["optimizer"].state_dict().keys()


def test_checkpoints_go_both_ways(tmp_path):
    theirs, ours = run_program("torch.nn")["net"], run_program("fastgen.nn")["Net"]()
    for source, target in [(theirs, ours), (run_program("fastgen.nn")["net"], run_program("torch.nn")["Net"]())]:
        torch.save(source.state_dict(), tmp_path / "net.pt")
        assert target.load_state_dict(torch.load(tmp_path / "net.pt")) == torch.nn.modules.module._IncompatibleKeys(
            [], []
        )
        x = torch.randn(2, 3, 5)
        # fastgen's recurrent layers round in another order.
        torch.testing.assert_close(source.eval()(x), target.eval()(x))


def test_pickles_of_torchs_modules_name_no_class_of_ours():
    """They load where fastgen is not installed."""
    net = fastgen.nn.Sequential(fastgen.nn.LayerNorm(2), fastgen.nn.ReLU())
    content = pickle.dumps(net)
    assert b"fastgen" not in content
    x = torch.randn(4, 2)
    assert torch.equal(pickle.loads(content)(x), net(x))


def test_compile_without_a_break():
    import fastgen.nn as nn
    import fastgen.nn.functional as F

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(F.relu(self.layer(x))) + nn.utils.parameters_to_vector([x]).sum()

    net, x = Net(), torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(x), net(x))


def test_no_file_of_ours_hides_a_module_of_torch():
    own = {module.name for module in pkgutil.iter_modules(fastgen.nn.__path__)}
    assert own & {name.split(".")[0] for name in SUBMODULES} == set()


def test_own_modules_win(tmp_path):
    """A copy of the package with a bigger.py that takes over Linear, and a file that has a name of torch's."""
    package = shutil.copytree(
        Path(fastgen.__file__).parent, tmp_path / "fastgen", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (package / "nn" / "bigger.py").write_text("import torch\nclass Linear(torch.nn.Linear):\n    faster = True\n")
    (package / "nn" / "grad.py").write_text("ours = True\n")
    init = package / "nn" / "__init__.py"
    init.write_text(init.read_text() + "\nfrom fastgen.nn.bigger import Linear\n")
    code = """
import torch, fastgen.nn as nn, fastgen.nn.bigger, fastgen.nn.grad, fastgen.nn.utils.rnn
from fastgen.nn import *
assert nn.__file__.startswith(__import__("sys").argv[1])
assert nn.Linear is Linear is fastgen.nn.bigger.Linear and Linear.faster and Linear.__module__ == "fastgen.nn.bigger"
assert not hasattr(torch.nn.Linear, "faster") and nn.modules.Linear is torch.nn.modules.linear.Linear is torch.nn.Linear
assert nn.grad.ours and not hasattr(torch.nn, "bigger") and nn.Conv1d is torch.nn.Conv1d
assert fastgen.nn.utils.rnn is torch.nn.utils.rnn
print("ours")
"""
    assert python(code, str(tmp_path), cwd=tmp_path) == "ours\n"


@pytest.mark.slow
def test_type_checkers_see_the_types_of_torch(tmp_path):
    pytest.importorskip("mypy")
    lines = [
        "import fastgen.nn as nn",
        "import fastgen.nn.functional as F",
        "from fastgen.nn import *",
        "reveal_type(nn.Linear(1, 2))",
        "reveal_type(Conv2d(1, 2, 3))",
        "reveal_type(F.relu)",
        "reveal_type(nn.functional.relu)",
    ]
    (tmp_path / "program.py").write_text("\n".join(lines))
    root = Path(fastgen.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "program.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"MYPYPATH": str(root)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split('"')[1].split(" (")[0] for line in done.stdout.splitlines() if "Revealed" in line] == [
        "torch.nn.modules.linear.Linear",
        "torch.nn.modules.conv.Conv2d",
        "def",
        "def",
    ]
